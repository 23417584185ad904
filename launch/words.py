"""Names under which people of other frameworks know a key, and what answers them: data, which needs nothing to be read.

Taken from the options of Hugging Face (TrainingArguments, a model's config.json, accelerate, TRL), torchtitan, DeepSpeed's
JSON, axolotl, Megatron-LM, Lightning, nanoGPT and torchrun, beside short forms of them that people type. What is written
instead may hold {value}, what was given, and the numbers of this configuration that `answers.numbers` works out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Word:
    """A word of others: its `names` elsewhere, what is written here instead of NAME=VALUE, and what that is.

    `write`: where the value does not decide it; none: there is no such thing here. `values`: by the value, in small letters.
    `group`: the value is the name of a choice, which the table CHOICES may know.
    """

    names: str
    write: str = ""
    means: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    group: str = ""


def _switch(on: str, off: str = "") -> dict[str, str]:
    return {"true": on, "1": on, "false": off, "0": off}


WORDS = (
    # How long, and how much at a time.
    Word(
        "max_steps train_iters max_iters num_steps total_steps training.steps total_iters iters iterations",
        "steps={value}",
        "optimizer steps of the whole run, also of one that goes on",
    ),
    Word("train_samples", "steps={steps_of_samples}", "a step takes batch.global_size={global_size} sequences"),
    Word(
        "num_train_epochs num_epochs max_epochs",
        "epochs={value}",
        "in the place of steps: times that the run reads the data",
    ),
    Word(
        "max_tokens train_tokens num_tokens training.num_tokens",
        "tokens={value}",
        "in the place of steps: all that the run reads; a step takes {tokens}",
    ),
    Word(
        "per_device_train_batch_size train_micro_batch_size_per_gpu micro_batch_size local_batch_size "
        "training.local_batch_size per_gpu_train_batch_size device_batch_size microbatch_size training.batch_size",
        "batch.micro_size={value}",
        "sequences a forward of one rank; batch.global_size={global_size} is that of a step over all ranks",
    ),
    Word(
        "gradient_accumulation_steps accumulate_grad_batches grad_accum_steps",
        "batch.global_size={size_of_accumulation}",
        "gradient accumulation is batch.global_size / (batch.micro_size x data ranks): now {accumulation}",
    ),
    Word(
        "train_batch_size global_batch_size training.global_batch_size total_batch_size batch_size",
        "batch.global_size={value}",
        "sequences a step over all ranks, of which a forward takes batch.micro_size={micro_size}",
    ),
    Word(
        "num_tokens_per_train_step training.num_tokens_per_train_step",
        "batch.global_tokens={value}",
        "in the place of batch.global_size: the tokens of a step, now {tokens}",
    ),
    Word(
        "seq_length sequence_len sequence_length max_seq_length max_seq_len block_size seq_len training.seq_len "
        "max_length context_length model_max_length cutoff_len encoder_seq_length max_context_length "
        "training.max_context_length",
        "batch.seq_len={value}",
        "tokens of a sequence",
    ),
    Word(
        "max_position_embeddings n_positions n_ctx",
        "batch.seq_len={value}",
        "positions are rotary, and have no largest number of their own; a sequence has batch.seq_len tokens",
    ),
    Word(
        "rampup_batch_size step_batch_size_schedule auto_find_batch_size decrease_batch_size_if_needed",
        means="a batch has the same size in every step; give batch.global_size, and batch.micro_size by hand",
    ),
    Word(
        "exit_duration_in_mins max_time exit_interval",
        means="a run ends after its steps, or saves and leaves when it is asked to (SIGTERM, Ctrl-C); "
        "`rowwise slurm` asks it slurm.signal_seconds before the limit",
    ),
    # The optimizer.
    Word(
        "learning_rate lr max_lr peak_lr optimizer.lr optimizer.params.lr base_lr warmup_max_lr "
        "scheduler.params.warmup_max_lr optimizer.learning_rate optim.learning_rate",
        "optim.lr={value}",
        "the highest of the run, which schedule= varies",
    ),
    Word("optimizer optimizer_name optimizer.name optimizer.type", group="optim"),
    Word("weight_decay optimizer.weight_decay optimizer.params.weight_decay wd l2", "optim.weight_decay={value}"),
    Word(
        "adam_beta1 beta1 optimizer.beta1",
        "optim.betas=[{value},{beta2}]",
        "both betas stand in one list: now [{beta1},{beta2}]",
    ),
    Word(
        "adam_beta2 beta2 optimizer.beta2",
        "optim.betas=[{beta1},{value}]",
        "both betas stand in one list: now [{beta1},{beta2}]",
    ),
    Word("betas optimizer.betas optimizer.params.betas", "optim.betas={value}"),
    Word("adam_epsilon adam_eps epsilon eps optimizer.eps optimizer.params.eps", "optim.eps={value}"),
    Word(
        "momentum sgd_momentum muon_momentum",
        "optim.momentum={value}",
        "that of Adam's rules is the first of optim.betas",
    ),
    Word(
        "max_grad_norm clip_grad gradient_clipping gradient_clip_val grad_clip max_norm training.max_norm clip_grad_norm "
        "optim.clip_norm",
        "clip_norm={value}",
        "the largest global norm of a gradient; 0 is off",
    ),
    Word("optim_target_modules", "optim.assign=[{{match: PATTERN, rule: adamw}}]", "rules by name"),
    Word("qgalore_rank", "optim.rank={value}"),
    Word("update_proj_gap qgalore_update_proj_gap", "optim.refresh_every={value}"),
    Word("optim_args", "optim.KEY=VALUE", "every argument of a rule is a key of its own"),
    Word(
        "early_step_in_backward optimizer.early_step_in_backward optimizer_in_bwd",
        values=_switch("optim.in_backward=true", "optim.in_backward=false"),
        means="without clipping (clip_norm=0) and accumulation",
    ),
    Word(
        "fused foreach fused_adam optimizer.implementation torch_adam apex",
        means="kernels are chosen by the device; leave it out",
    ),
    Word(
        "optimizer_cpu_offload offload_optimizer zero_optimization.offload_optimizer "
        "zero_optimization.offload_optimizer.device offload_optimizer_device cpu_offload zero_optimization.cpu_offload "
        "offload_param zero_optimization.offload_param zero_optimization.offload_param.device offload_params "
        "enable_cpu_offload training.enable_cpu_offload offload_param_device fsdp_offload_params nvme_path",
        means="nothing is kept outside a device's memory; states are split by parallel.zero=1 to 3 and made small by "
        "optim=adamw8bit (2 bytes a parameter) or optim=apollo",
    ),
    Word(
        "ema ema_decay use_ema swa_lrs",
        means="no average of the weights is kept; schedule=wsd ends a run on the decay that replaces it",
    ),
    Word(
        "embedding_lr embedding_lr_scale decoupled_lr lr_groups",
        means="all parameters have optim.lr",
    ),
    # The schedule.
    Word(
        "lr_scheduler_type lr_scheduler lr_decay_style scheduler scheduler.type lr_schedule "
        "lr_scheduler.name lr_scheduler.decay_type",
        group="schedule",
    ),
    Word(
        "warmup_steps lr_warmup_iters warmup_iters num_warmup_steps lr_warmup_steps warmup_num_steps "
        "scheduler.params.warmup_num_steps lr_scheduler.warmup_steps optim.warmup_steps",
        "schedule.warmup_steps={value}",
        "or schedule.warmup, a share of the run",
    ),
    Word(
        "warmup_ratio lr_warmup_fraction warmup",
        "schedule.warmup={value}",
        "a share of the run",
    ),
    Word(
        "min_lr lr_min lr_end eta_min",
        "schedule.floor={floor}",
        "a share of optim.lr, which the rate ends at",
    ),
    Word(
        "cosine_min_lr_ratio min_lr_rate min_lr_ratio lr_scheduler.lr_min lr_scheduler.min_lr_factor min_lr_factor "
        "final_lr_frac",
        "schedule.floor={value}",
        "a share of optim.lr, which the rate ends at",
    ),
    Word(
        "lr_decay_iters lr_decay_steps",
        "steps={value}",
        "every schedule ends with the run",
    ),
    Word(
        "lr_wsd_decay_iters wsd_decay_steps num_decay_steps",
        "schedule.decay_steps={value}",
        "with schedule=wsd; or schedule.decay_share",
    ),
    Word(
        "lr_scheduler.decay_ratio decay_ratio warmdown_ratio",
        "schedule.decay_share={value}",
        "with schedule=wsd",
    ),
    Word("lr_wsd_decay_style", "schedule.decay={value}", "with schedule=wsd"),
    Word(
        "lr_scheduler_kwargs scheduler.params lr_div_factor", "schedule.KEY=VALUE", "every argument is a key of its own"
    ),
    Word("decay_lr", values=_switch("schedule=cosine", "schedule=constant")),
    Word("auto_lr_find", "experiment=lr_range", "raises the rate until the loss blows up"),
    # Precision.
    Word(
        "bf16 bfloat16 bf16.enabled bf16_full_eval",
        values=_switch("precision=bf16", "precision=fp32") | {"auto": "precision=bf16", "full": "precision=bf16"},
        means="float32 parameters, products in bfloat16",
    ),
    Word(
        "fp16 float16 fp16.enabled half fp16_full_eval amp fp16_opt_level",
        values=_switch("precision=fp16", "precision=fp32"),
        means="with a loss scale that adapts itself",
    ),
    Word("fp32 float32", values=_switch("precision=fp32")),
    Word(
        "mixed_precision dtype torch_dtype training.mixed_precision_param mixed_precision_param training.dtype "
        "params_dtype autocast_dtype",
        group="precision",
    ),
    Word("tf32 allow_tf32", "precision.tf32={value}", "with precision=fp32"),
    Word(
        "fp8 fp8_format fp8_recipe use_fp8 float8 fp8_param",
        "precision=bf16",
        "8-bit products are not built",
    ),
    Word(
        "loss_scale fp16.loss_scale initial_loss_scale",
        "precision.initial_scale={value}",
        "with precision=fp16; it then adapts itself",
    ),
    Word("initial_scale_power fp16.initial_scale_power", "precision.initial_scale={power}", "with precision=fp16"),
    Word("loss_scale_window fp16.loss_scale_window", "precision.growth_every={value}", "with precision=fp16"),
    Word(
        "accumulate_allreduce_grads_in_fp32 fp32_allreduce mixed_precision_reduce training.mixed_precision_reduce "
        "grad_reduce_in_bf16 communication_data_type grad_accum_dtype data_types.grad_accum_dtype",
        "precision.reduce=fp32",
        "with precision=bf16: the dtype in which gradients are summed",
    ),
    Word(
        "main_params_dtype",
        "optim.param_dtype=bf16",
        "bfloat16 parameters, rounded stochastically, instead of float32 ones",
    ),
    # Layout.
    Word(
        "zero_stage zero_optimization.stage stage zero zero_optimization",
        "parallel.zero={value}",
        "what is split over ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters",
    ),
    Word(
        "fsdp sharding_strategy data_parallel_sharding_strategy fsdp_sharding_strategy fsdp_config.sharding_strategy",
        "parallel.zero=3",
        "FSDP's names: NO_SHARD is parallel.zero=0, SHARD_GRAD_OP 2, FULL_SHARD 3, HYBRID_SHARD 3 with parallel.replicate",
        {
            "true": "parallel.zero=3",
            "false": "parallel.zero=0",
            "full_shard": "parallel.zero=3",
            "shard_grad_op": "parallel.zero=2",
            "no_shard": "parallel.zero=0",
            "hybrid_shard": "parallel.zero=3 parallel.replicate=MACHINES",
            "hybrid_shard_zero2": "parallel.zero=2 parallel.replicate=MACHINES",
            "optim": "parallel.zero=1",
            "optim_grads": "parallel.zero=2",
            "optim_grads_params": "parallel.zero=3",
        },
    ),
    Word(
        "fsdp_config use_torch_fsdp2 use_megatron_fsdp fsdp_version fsdp_transformer_layer_cls_to_wrap "
        "transformer_layer_cls_to_wrap auto_wrap_policy fsdp_auto_wrap_policy",
        "parallel.zero=3",
        "FSDP2; blocks are wrapped one by one",
    ),
    Word(
        "fsdp_reshard_after_forward reshard_after_forward parallelism.fsdp_reshard_after_forward "
        "fsdp_config.reshard_after_forward",
        "parallel.zero=3",
        "parameters are freed after a forward at parallel.zero=3, and stay at 2",
        _switch("parallel.zero=3", "parallel.zero=2") | {"always": "parallel.zero=3", "never": "parallel.zero=2"},
    ),
    Word(
        "use_distributed_optimizer",
        values=_switch("parallel.zero=1", "parallel.zero=0"),
        means="optimizer states are split over ranks",
    ),
    Word("ddp", "parallel.zero=0", "nothing is split over ranks"),
    Word(
        "deepspeed deepspeed_config zero_hpz_partition_size",
        "parallel.zero=1",
        "or 2 or 3; its JSON is not read, but config=FILE says for each key of it what to write",
    ),
    Word(
        "strategy distributed_type",
        "parallel.zero=N",
        "what is split over ranks: 0 nothing (DDP), 1, 2, or 3 (FSDP)",
        {
            "ddp": "parallel.zero=0",
            "fsdp": "parallel.zero=3",
            "fsdp2": "parallel.zero=3",
            "deepspeed_stage_1": "parallel.zero=1",
            "deepspeed_stage_2": "parallel.zero=2",
            "deepspeed_stage_3": "parallel.zero=3",
            "multi_gpu": "parallel.zero=0",
        },
    ),
    Word("accelerator", means="the device is found; leave it out"),
    Word(
        "data_parallel_replicate_degree parallelism.data_parallel_replicate_degree dp_replicate_size dp_replicate "
        "num_distributed_optimizer_instances",
        "parallel.replicate={value}",
    ),
    Word(
        "data_parallel_shard_degree parallelism.data_parallel_shard_degree dp_shard_size dp_shard data_parallel_size "
        "data_parallel_degree dp_size dp",
        "parallel.shard={value}",
        "-1, the default, takes the ranks that are left",
    ),
    Word(
        "tensor_parallel_degree parallelism.tensor_parallel_degree tensor_model_parallel_size tensor_parallel_size "
        "tp_size tp model_parallel_size tensor_parallel autotp_size mp_size",
        means="matrices are not split inside a layer; parallel.zero=3 splits their storage, parallel.ulysses and "
        "parallel.ring the tokens, parallel.pipeline the layers",
    ),
    Word(
        "sequence_parallel enable_sequence_parallel parallelism.enable_sequence_parallel",
        "parallel.ulysses=N",
        "there is no tensor parallelism that this could accompany; N ranks share every sequence",
    ),
    Word(
        "context_parallel_degree parallelism.context_parallel_degree context_parallel_size cp_size cp ring_degree",
        "parallel.ring={value}",
        "keys and values travel round a ring; parallel.ulysses shares attention by heads",
    ),
    Word(
        "sequence_parallel_degree sequence_parallel_size sp_size ulysses_degree",
        "parallel.ulysses={value}",
        "attention is shared by heads; parallel.ring shares it by keys and values that travel",
    ),
    Word(
        "context_parallel_load_balancer parallelism.context_parallel_load_balancer",
        "parallel.ring_order=zigzag",
        "or contiguous, or striped",
    ),
    Word(
        "context_parallel_rotate_method cp_comm_type parallelism.context_parallel_rotate_method ring_attn_func "
        "heads_k_stride",
        "parallel.ring=N",
        "by messages round a ring; parallel.ulysses=N: by an all-to-all",
    ),
    Word(
        "pipeline_parallel_degree parallelism.pipeline_parallel_degree pipeline_model_parallel_size "
        "pipeline_parallel_size pp_size pp pipeline.stages",
        "parallel.pipeline={value}",
    ),
    Word(
        "pipeline_parallel_schedule parallelism.pipeline_parallel_schedule pp_schedule",
        "parallel.pipeline_schedule=1f1b",
        "possible are gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_h2, zb_v, blockwise, auto, or a CSV",
        {
            "1f1b": "parallel.pipeline_schedule=1f1b",
            "gpipe": "parallel.pipeline_schedule=gpipe",
            "interleaved1f1b": "parallel.pipeline_schedule=interleaved_1f1b",
            "interleavedzerobubble": "parallel.pipeline_schedule=zb_h1",
            "zbvzerobubble": "parallel.pipeline_schedule=zb_v",
        },
    ),
    Word(
        "pipeline_parallel_schedule_csv parallelism.pipeline_parallel_schedule_csv",
        "parallel.pipeline_schedule={value}",
        "the path of a CSV, in torch's format",
    ),
    Word(
        "virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank",
        "parallel.virtual_stages={value}",
        "stages a rank",
    ),
    Word(
        "num_layers_per_virtual_pipeline_stage pipeline_parallel_layers_per_stage "
        "parallelism.pipeline_parallel_layers_per_stage",
        "parallel.virtual_stages=N",
        "stages a rank; layers are cut into stages of nearly equal cost",
    ),
    Word(
        "pipeline_parallel_microbatch_size parallelism.pipeline_parallel_microbatch_size",
        "batch.micro_size={value}",
    ),
    Word(
        "num_pp_microbatches parallelism.num_pp_microbatches num_microbatches",
        "batch.global_size={size_of_accumulation}",
        "micro-batches are batch.global_size / (batch.micro_size x data ranks): now {accumulation}",
    ),
    Word(
        "expert_parallel_degree parallelism.expert_parallel_degree expert_model_parallel_size num_experts "
        "num_moe_experts moe_router_topk num_experts_per_tok num_local_experts moe_layer_freq",
        means="there are no mixtures of experts; every model here is dense (model=tiny to llama3_70b)",
    ),
    Word(
        "gradient_checkpointing activation_checkpointing recompute_granularity recompute_activations "
        "checkpoint_activations activation_checkpoint.mode activation_checkpoint recompute_method recompute_num_layers "
        "gradient_checkpointing_kwargs activation_checkpointing.partition_activations selective_checkpointing recompute",
        means="activations are kept, not computed again; a smaller batch.micro_size, parallel.ulysses, parallel.ring or "
        "parallel.pipeline makes them fewer on a rank",
    ),
    Word(
        "activation_offloading cpu_checkpointing activation_checkpointing.cpu_checkpointing",
        means="activations stay on the device; a smaller batch.micro_size, or parallel.ulysses, makes them fewer",
    ),
    Word(
        "overlap_grad_reduce overlap_param_gather overlap_comm zero_optimization.overlap_comm reduce_bucket_size "
        "zero_optimization.reduce_bucket_size allgather_bucket_size zero_optimization.allgather_bucket_size "
        "ddp_bucket_cap_mb contiguous_gradients zero_optimization.contiguous_gradients reduce_scatter "
        "zero_optimization.reduce_scatter stage3_prefetch_bucket_size stage3_max_live_parameters "
        "zero_optimization.stage3_prefetch_bucket_size zero_optimization.stage3_param_persistence_threshold "
        "ddp_find_unused_parameters find_unused_parameters sync_module_states use_orig_params",
        means="messages overlap with the computation by themselves; leave it out",
    ),
    Word(
        "zero_quantized_weights zero_quantized_gradients zero_optimization.zero_quantized_weights "
        "zero_optimization.zero_quantized_gradients",
        means="what ranks send each other is not rounded, so that a run is the same on every layout",
    ),
    Word(
        "nproc_per_node num_gpus devices gpus n_gpu num_processes ngpu num_gpus_per_node world_size",
        "nproc={value}",
        "workers a machine; null: one a GPU",
    ),
    Word(
        "nnodes num_nodes num_machines nodes",
        "--nodes {value}",
        "an option of `rowwise train`; --rendezvous HOST:PORT too",
    ),
    Word(
        "master_addr master_port rdzv_endpoint rdzv_backend main_process_ip main_process_port rdzv_id node_rank "
        "machine_rank standalone",
        "--rendezvous HOST:PORT",
        "where several machines meet; one machine needs nothing",
    ),
    Word(
        "local_rank rank device no_cuda use_cpu backend ddp_backend distributed_backend",
        means="the device and what its ranks talk by are found; CUDA_VISIBLE_DEVICES= makes it a CPU's",
    ),
    Word("distributed_timeout_minutes", "parallel.timeout_seconds={seconds_of_minutes}", "seconds"),
    Word(
        "ddp_timeout comm.train_timeout_seconds comm.init_timeout_seconds train_timeout_seconds",
        "parallel.timeout_seconds={value}",
        "seconds",
    ),
    # The model.
    Word("hidden_size n_embd d_model embed_dim n_embed emb_dim", "model.dim={value}"),
    Word("num_hidden_layers num_layers n_layer n_layers depth num_blocks", "model.layers={value}"),
    Word("num_attention_heads n_head n_heads num_heads", "model.heads={value}"),
    Word("num_key_value_heads num_query_groups n_kv_heads n_kv_head num_kv_heads", "model.kv_heads={value}"),
    Word("group_query_attention", "model.kv_heads=N", "the number of key/value heads; now {kv_heads} of {heads} heads"),
    Word("head_dim kv_channels d_head", "model.head_dim={value}", "null: model.dim / model.heads"),
    Word("intermediate_size ffn_hidden_size ffn_dim d_ff n_inner hidden_dim", "model.ffn_dim={value}"),
    Word("vocab_size padded_vocab_size make_vocab_size_divisible_by", "model.vocab_size={value}"),
    Word("tie_word_embeddings tie_weights weight_tying", "model.tie_embeddings={value}"),
    Word(
        "untie_embeddings_and_output_weights",
        values=_switch("model.tie_embeddings=false", "model.tie_embeddings=true"),
    ),
    Word(
        "rms_norm_eps layernorm_epsilon norm_epsilon layer_norm_eps layer_norm_epsilon norm_eps",
        "model.norm_eps={value}",
    ),
    Word("rope_theta rotary_base rope_base", "model.rope_theta={value}"),
    Word(
        "rope_scaling rope_scaling_factor use_rope_scaling rope_parameters",
        "model.rope_scaling={{factor: 8.0}}",
        "as Llama 3's; null is off",
    ),
    Word("initializer_range init_method_std init_std", "model.init_std={value}"),
    Word("qk_layernorm qk_norm use_qk_norm", "model.qk_norm={value}"),
    Word(
        "dropout attention_dropout hidden_dropout resid_pdrop attn_pdrop embd_pdrop",
        means="there is no dropout; leave it out",
    ),
    Word(
        "bias attention_bias mlp_bias add_bias_linear disable_bias_linear normalization hidden_act activation_func swiglu "
        "position_embedding_type use_rotary_position_embeddings squared_relu",
        means="every model is of Llama's or Qwen's form: no bias, RMSNorm, SwiGLU, rotary positions",
    ),
    Word(
        "model_name_or_path base_model pretrained_model_name_or_path pretrained_checkpoint initial_load_path "
        "checkpoint.initial_load_path model_id finetune init_from",
        "model.init_from={value}",
        "the folder of a Hugging Face model on this disk, which says its shape too",
    ),
    Word("model_name model_type model.flavor model.size arch flavor", group="model"),
    Word("config_name model_config", "model=NAME", "possible are the files of conf/model, and those of --config-dir"),
    Word(
        "attn_implementation use_flash_attn flash_attention use_flash_attention sdp_attention attention_backend "
        "flash_attention_2 flex_attention xformers_attention",
        means="attention is chosen by the device: FlashAttention on GPUs in 16 bits; leave it out",
    ),
    Word(
        "use_liger_kernel chunked_cross_entropy cross_entropy_loss_fusion cut_cross_entropy flash_attn_cross_entropy",
        means="kernels are chosen by the device; leave it out",
    ),
    Word(
        "torch_compile compile.enable training.compile",
        "compile={value}",
        "torch.compile of each block",
    ),
    Word("torch_compile_backend torch_compile_mode compile.backend", "compile=true", "by torch's own backend and mode"),
    Word(
        "lora_r lora_rank lora_alpha lora_dropout lora_target_modules adapter use_peft peft qlora lora_target_linear "
        "load_in_4bit load_in_8bit peft_use_dora quantization",
        means="all weights are trained, there are no adapters; optim=apollo_mini or optim=galore trains them with little state",
    ),
    Word(
        "freeze_all_layers unfrozen_parameters freeze lisa_n_layers",
        means="all parameters are trained; none can be frozen",
    ),
    # The data.
    Word(
        "dataset data_path train_file dataset_name train_data_path datasets dataset_path training.dataset dataset_dir "
        "pretraining_dataset train_data training.dataset_path data_dir input_dir",
        "data=text data.files={value}",
        "files, folders or globs on this disk; data=tokens for token files, data=hf for parquet, arrow and JSON lines",
    ),
    Word("data_files", "data.files={value}", "with data=text, tokens or hf"),
    Word("text_column dataset_text_field field", "data.column={value}", "with data=hf"),
    Word(
        "tokenizer tokenizer_path tokenizer_name tokenizer_model model.tokenizer_path hf_assets_path tokenizer_config "
        "tokenizer_name_or_path vocab_file tokenizer_type",
        "data.tokenizer={value}",
        "the path of a tokenizer.json, or bytes; with data=text or hf",
    ),
    Word("eos_token append_eod eod", "data.end_of_text={value}", "with data=text or hf"),
    Word(
        "val_set_size validation_split test_size validation_split_percentage",
        "data.holdout={value}",
        "the share that is held out, such as 0.01",
    ),
    Word(
        "eval_dataset test_datasets valid_data_path validation_file validation.dataset split",
        "data.holdout=0.01",
        "the share of data.files that is held out; it has no files of its own",
    ),
    Word(
        "sample_packing packing pretrain_multipack_attn reset_attention_mask reset_position_ids eod_mask_loss "
        "dataloader_inter_document_masking batch_flattening pad_to_sequence_len block_cross_document_attention",
        "data.mask_documents=true",
        "documents are always packed into whole sequences; this keeps attention inside each",
        _switch("data.mask_documents=true", "data.mask_documents=false"),
    ),
    Word(
        "dataset_prepared_path data_cache_path",
        "data.cache_dir={value}",
        "with data=text, hf or stdlib",
    ),
    Word(
        "dataloader_num_workers num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last "
        "dataset_num_proc pin_memory persistent_workers preprocessing_num_workers dataset_processes",
        means="tokens are memory-mapped and read ahead by a thread; leave it out",
    ),
    Word(
        "shuffle shuffle_merged_datasets group_by_length train_sampling_strategy dataloader_type curriculum_learning "
        "data_efficiency curriculum_sampling",
        "seed={value}",
        "samples come in an order that seed decides, the same on every layout",
    ),
    Word("data_seed training.seed random_seed manual_seed debug.seed seed_everything", "seed={value}"),
    Word(
        "chat_template train_on_inputs datasets.type rl rl_beta reward_model sft dpo_loss_type",
        means="models are trained on every token of plain text; there are no conversations, masks of prompts or rewards",
    ),
    Word("streaming", means="text is read a piece at a time, and its tokens are kept in data.cache_dir"),
    # Checkpoints.
    Word(
        "save_steps save_interval checkpoint.interval save_every checkpoint_interval every_n_train_steps save_freq "
        "saver_interval",
        "checkpoint.every={value}",
        "steps; 0: only at the end",
    ),
    Word(
        "save_total_limit checkpoint.keep_latest_k keep_latest_k most_recent_k save_top_k num_checkpoints_to_keep "
        "max_checkpoints",
        "checkpoint.keep={value}",
        "the newest that stay; 0: all",
    ),
    Word(
        "async_save checkpoint.async_mode async_mode",
        "checkpoint.background=true",
        values=_switch("checkpoint.background=true", "checkpoint.background=false")
        | {"disabled": "checkpoint.background=false"},
    ),
    Word(
        "save_strategy enable_checkpointing checkpoint.enable checkpoint.enable_checkpoint enable_checkpoint",
        "checkpoint.every=100",
        "steps; the last step is always saved",
        {"no": "checkpoint.every=0", "false": "checkpoint.every=0"},
    ),
    Word(
        "resume_from_checkpoint load ckpt_path load_checkpoint resume_from checkpoint.load_step auto_resume "
        "auto_resume_from_checkpoints load_dir ckpt_step restore_from",
        "resume={value}",
        "runs/NAME, or a checkpoint in it; auto, the default, goes on with what run_dir holds",
        _switch("resume=auto", "resume=never"),
    ),
    Word("overwrite_output_dir", "name=OTHER", "a run is never overwritten; give another name, or remove its folder"),
    Word(
        "output_dir out_dir save default_root_dir dump_folder job.dump_folder save_dir logging_dir checkpoint.folder "
        "checkpoint_dir work_dir log_dir",
        "run_dir={value}",
        "runs/${{name}} by default",
    ),
    Word("run_name exp_name experiment_name wandb_name wandb_run_name wandb_exp_name job_name", "name={value}"),
    Word(
        "save_only_model checkpoint.last_save_model_only last_save_model_only save_safetensors export_dtype push_to_hub "
        "hub_model_id no_save_optim",
        means="`rowwise export run=runs/NAME to=DIR` writes the model alone, as Hugging Face safetensors",
    ),
    Word(
        "load_best_model_at_end metric_for_best_model early_stopping_patience early_stopping greater_is_better",
        means="a run ends after its steps; checkpoint.keep=0 keeps every checkpoint, and the report shows the held-out loss",
    ),
    # Evaluation, records, the screen.
    Word(
        "eval_steps eval_interval val_check_interval eval_every validation.freq",
        "eval.every={value}",
        "steps; 0 is off",
    ),
    Word("eval_iters limit_val_batches validation.steps", "eval.batches={value}"),
    Word(
        "eval_strategy evaluation_strategy do_eval evals_per_epoch validation.enable do_train do_predict",
        "eval.every=100",
        "steps; 0 is off",
        {"no": "eval.every=0", "false": "eval.every=0"},
    ),
    Word(
        "per_device_eval_batch_size eval_batch_size eval_micro_batch_size eval_global_batch_size",
        "batch.micro_size={value}",
        "the held-out loss is measured in the same batches",
    ),
    Word("eval_only skip_train", means="`rowwise report run=runs/NAME` shows the held-out loss of a run"),
    Word(
        "logging_steps log_interval metrics.log_freq log_every_n_steps steps_per_print log_freq print_freq "
        "log_every_steps",
        "log_every={value}",
        "steps between lines where there is no terminal; metrics.jsonl has every step",
    ),
    Word("report_to loggers logger log_with", group="tracker"),
    Word(
        "use_wandb wandb_log metrics.enable_wandb enable_wandb wandb wandb.enabled wandb_mode",
        values=_switch("tracker=wandb", "tracker=none")
        | {"online": "tracker=wandb", "offline": "tracker=wandb tracker.mode=offline", "disabled": "tracker=none"},
    ),
    Word("wandb_project project wandb.project", "tracker=wandb tracker.project={value}"),
    Word("wandb_entity wandb.team wandb_team wandb.entity", "tracker=wandb tracker.entity={value}"),
    Word("wandb_group wandb.group", "tracker=wandb tracker.group={value}"),
    Word(
        "use_tensorboard tensorboard metrics.enable_tensorboard enable_tensorboard tensorboard.enabled tensorboard_log",
        values=_switch("tracker=tensorboard", "tracker=none"),
    ),
    Word("tensorboard_dir tensorboard.output_path", "tracker=tensorboard", "it writes into the run's folder"),
    Word("use_mlflow", values=_switch("tracker=mlflow", "tracker=none")),
    Word("mlflow_experiment_name", "tracker=mlflow tracker.experiment={value}"),
    Word("mlflow_tracking_uri", "tracker=mlflow tracker.uri={value}"),
    Word("use_trackio", values=_switch("tracker=trackio", "tracker=none")),
    Word("trackio_space_id", "tracker=trackio tracker.space={value}"),
    Word(
        "use_comet comet_project_name",
        "tracker=wandb",
        "or mlflow, trackio, tensorboard; metrics.jsonl is always written",
    ),
    Word(
        "log_params_norm log_grad_norms watch_gradients wandb_watch",
        "log.norms_every=100",
        "norms of every parameter, gradient and update",
    ),
    Word(
        "loss_watchdog_threshold loss_watchdog_patience skip_bad_steps",
        "on_spike=skip",
        "or rollback; spike.threshold says how far above is a spike",
    ),
    Word(
        "profiling.enable_profiling enable_profiling use_pytorch_profiler profiler.enable_profiling profiling.profile_freq "
        "profile_step_start profile_step_end profiler_steps profiler_steps_start",
        "profile.steps=[20,25]",
        "the first and the last step that are profiled; profile.ranks says where",
    ),
    Word(
        "wall_clock_breakdown log_throughput timing_log_level log_straggler",
        "log.ranks_every=100",
        "which rank holds up the others; a record says how long data, step, evaluation and saving took",
    ),
    Word(
        "log_level logging_first_step disable_tqdm logging_strategy log_level_replica metrics.disable_color_printing "
        "dump_state verbose",
        means="what is shown is decided by the terminal; log_every is for where there is none",
    ),
    Word(
        "gc_freq manual_gc training.gc_freq torch_empty_cache_steps gc_steps empty_unused_memory_level",
        means="memory looks after itself; leave it out",
    ),
    Word(
        "deterministic full_determinism deterministic_mode debug.deterministic use_deterministic_algorithms",
        means="what is random depends on seed and the step alone; a run that goes on is the same to the bit on its layout",
    ),
    Word("gpu_peak_flops", "peak_flops={value}", "16-bit FLOP/s of a device"),
    Word(
        "label_smoothing_factor label_smoothing neftune_noise_alpha z_loss",
        means="the loss is the plain cross-entropy of every token",
    ),
    Word(
        "num_return_sequences max_new_tokens generation_max_new_tokens", "sample.tokens={value}", "written at the end"
    ),
    Word("temperature generation_temperature", "sample.temperature={value}"),
    Word("prompt prompts start", "sample.prompt={value}"),
    Word(
        "pruning target_sparsity final_sparsity",
        "sparsity=rigl sparsity.density={rest}",
        "the density is the share that is kept",
    ),
    # Files and Hydra's own.
    Word(
        "config_file job.config_file yaml_cfg config_path cfg_file hparams yaml ds_config",
        "config={value}",
        "a YAML of KEY: VALUE as here, or a run's config.yaml",
    ),
    Word("multirun", means="many runs with varied settings are `rowwise sweep KEY=A,B`"),
    Word("trust_remote_code", means="no code of a model's folder is run; leave it out"),
)


# Names of choices elsewhere -> ours, and why where it is another.
CHOICES: Mapping[str, Mapping[str, str]] = {
    "optim": {
        "adam": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_apex_fused": "adamw",
        "fusedadam": "adamw", "torch_adam": "adamw", "adam_w": "adamw", "adamw_anyprecision": "adamw", "optimi_adamw": "adamw",
        "torch.optim.adamw": "adamw", "adamw_8bit": "adamw8bit", "adamw_bnb_8bit": "adamw8bit", "adam8bit": "adamw8bit",
        "paged_adamw_8bit": "adamw8bit", "adamw_torch_8bit": "adamw8bit", "ao_adamw_8bit": "adamw8bit", "adam_8bit": "adamw8bit",
        "paged_adamw_32bit": "adamw", "adamw_torch_4bit": "adamw8bit", "lion_32bit": "lion", "lion_8bit": "lion8bit",
        "lion_pytorch": "lion", "paged_lion_8bit": "lion8bit", "paged_lion_32bit": "lion", "galore_adamw": "galore",
        "galore_adamw_8bit": "galore", "galore_adamw_layerwise": "galore", "galore_adafactor": "galore",
        "q_galore_adamw8bit": "galore", "apollo_adamw": "apollo", "apollo_adamw_layerwise": "apollo", "apollo-mini": "apollo_mini",
        "adafactor_hf": "adafactor", "dist_muon": "muon", "onebitadam": "adamw", "zerooneadam": "adamw",
    },
    "schedule": {
        "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine",
        "warmup_stable_decay": "wsd", "warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine",
        "onecycle": "one_cycle", "1cycle": "one_cycle", "lrrangetest": "lr_range", "cosine_annealing": "cosine",
        "linear_with_warmup": "linear", "cosine_with_warmup": "cosine", "polynomial": "linear", "trapezoidal": "wsd",
        "inverse-square-root": "infinite", "cosineannealinglr": "cosine", "rex": "linear", "none": "constant",
    },
    "precision": {
        "bfloat16": "bf16", "bf16-mixed": "bf16", "bf16-true": "bf16", "float16": "fp16", "16-mixed": "fp16", "16": "fp16",
        "half": "fp16", "float32": "fp32", "32": "fp32", "32-true": "fp32", "no": "fp32", "tf32": "fp32", "float64": "fp64",
        "64-true": "fp64", "double": "fp64", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32",
    },
    "tracker": {
        "weights_and_biases": "wandb", "wandblogger": "wandb", "tensorboardlogger": "tensorboard", "tb": "tensorboard",
        "false": "none", "null": "none", "all": "wandb", "true": "wandb",
    },
    "model": {
        "debugmodel": "tiny", "8b": "llama3_8b", "70b": "llama3_70b", "llama3": "llama3_8b", "llama": "llama_130m",
        "llama_3_8b": "llama3_8b", "llama_3_1_8b": "llama3_8b", "meta_llama_3_8b": "llama3_8b", "meta_llama_3_1_8b": "llama3_8b",
        "llama_3_70b": "llama3_70b", "meta_llama_3_70b": "llama3_70b", "llama_7b": "llama3_8b", "llama_2_7b": "llama3_8b",
        "llama2_7b": "llama3_8b", "qwen3": "qwen3_0_6b", "gpt2": "llama_130m",
        "gpt2_medium": "llama_350m", "gpt2_xl": "llama_1b",
    },
    "data": {
        "shakespeare": "text", "openwebtext": "hf", "c4": "hf", "huggingface": "hf", "parquet": "hf", "json": "hf",
        "jsonl": "hf", "arrow": "hf", "bin": "tokens", "npy": "tokens", "memmap": "tokens", "txt": "text", "mock": "stdlib",
    },
    "sparsity": {"2:4": "nm", "n:m": "nm", "magnitude": "gradual", "gmp": "gradual", "dense": "none", "null": "none"},
}  # fmt: skip

# Choices that people look for and that are not here -> what comes nearest.
MISSING: Mapping[str, Mapping[str, str]] = {
    "optim": {
        "sgd": "there is no plain SGD; lion and muon keep one momentum",
        "lamb": "there is no LAMB; adamw with clip_norm is what large batches of language models use",
        "fusedlamb": "there is no LAMB; adamw with clip_norm is what large batches of language models use",
        "adagrad": "there is no Adagrad; adafactor keeps the least state of those with a rate of its own",
        "rmsprop": "there is no RMSprop; adamw with optim.betas=[0,0.99] is nearest",
        "sophia": "there is no Sophia; adamw or muon is nearest",
        "shampoo": "there is no Shampoo; muon is nearest",
        "soap": "there is no SOAP; muon is nearest",
        "schedule_free_adamw": "no rule is schedule-free; adamw with schedule=wsd can end at any step",
        "ademamix": "there is no AdEMAMix; adamw is nearest",
        "adam_mini": "there is no Adam-mini; apollo_mini keeps as little",
        "came_pytorch": "there is no CAME; adafactor is nearest",
        "lomo": "there is no LOMO; optim.in_backward=true frees each gradient as soon as it is used",
        "dion": "there is no Dion; muon is nearest",
        "prodigy": "no rule finds its own rate; optim.lr=null follows from the model's size",
    },
    "schedule": {
        "cosine_with_restarts": "nothing restarts; cosine, or schedule.rewarm_at for one second warm-up",
        "reduce_lr_on_plateau": "no schedule depends on the loss; wsd holds the rate, and decays at the end",
        "inverse_sqrt": "infinite falls to a constant and can be annealed at any step",
        "warmupdecay": "linear falls to 0",
    },
    "precision": {"fp8": "8-bit products are not built; bf16 is nearest", "int8": "8-bit products are not built; bf16 is nearest"},
    "tracker": {
        "comet_ml": "metrics.jsonl is always written",
        "neptune": "metrics.jsonl is always written",
        "clearml": "metrics.jsonl is always written",
        "dvclive": "metrics.jsonl is always written",
        "swanlab": "metrics.jsonl is always written",
    },
    "parallel": {
        "ddp": "give parallel.zero=0", "fsdp": "give parallel.zero=3", "fsdp2": "give parallel.zero=3",
        "full_shard": "give parallel.zero=3", "hsdp": "give parallel.zero=3 parallel.replicate=MACHINES",
        "deepspeed": "give parallel.zero=1, 2 or 3", "zero1": "give parallel.zero=1", "zero2": "give parallel.zero=2",
        "zero3": "give parallel.zero=3", "tp": "there is no tensor parallelism; parallel.ulysses shares the tokens",
        "pp": "give parallel.pipeline=N", "cp": "give parallel.ring=N", "sp": "give parallel.ulysses=N",
    },
}  # fmt: skip
