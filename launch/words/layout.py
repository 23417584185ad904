"""Words for how a run is spread over devices."""

from rowwise.launch.words.word import Word, switch

WORDS = (
    Word("zero_stage stage zero zero_optimization", "parallel.zero={value}",
         "what is split over ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters"),
    Word("fsdp sharding_strategy data_parallel_sharding_strategy fsdp_sharding_strategy", "parallel.zero=3",
         "FSDP's names: NO_SHARD is parallel.zero=0, SHARD_GRAD_OP 2, FULL_SHARD 3, HYBRID_SHARD 3 with parallel.replicate",
         {"true": "parallel.zero=3", "false": "parallel.zero=0", "full_shard": "parallel.zero=3",
          "shard_grad_op": "parallel.zero=2", "no_shard": "parallel.zero=0",
          "hybrid_shard": "parallel.zero=3 parallel.replicate=MACHINES",
          "hybrid_shard_zero2": "parallel.zero=2 parallel.replicate=MACHINES", "optim": "parallel.zero=1",
          "optim_grads": "parallel.zero=2", "optim_grads_params": "parallel.zero=3"}),
    Word("fsdp_config use_torch_fsdp2 use_megatron_fsdp fsdp_version fsdp_transformer_layer_cls_to_wrap "
         "transformer_layer_cls_to_wrap auto_wrap_policy fsdp_auto_wrap_policy", "parallel.zero=3",
         "FSDP2; blocks are wrapped one by one"),
    Word("fsdp_reshard_after_forward reshard_after_forward", "parallel.zero=3",
         "parameters are freed after a forward at parallel.zero=3, and stay at 2",
         switch("parallel.zero=3", "parallel.zero=2") | {"always": "parallel.zero=3", "never": "parallel.zero=2"}),
    Word("use_distributed_optimizer", means="optimizer states are split over ranks",
         values=switch("parallel.zero=1", "parallel.zero=0")),
    Word("ddp", "parallel.zero=0", "nothing is split over ranks"),
    Word("deepspeed deepspeed_config zero_hpz_partition_size", "parallel.zero=1",
         "or 2 or 3; its JSON is not read, but config=FILE says for each key of it what to write"),
    Word("strategy distributed_type", "parallel.zero=N", "what is split over ranks: 0 nothing (DDP), 1, 2, or 3 (FSDP)",
         {"ddp": "parallel.zero=0", "fsdp": "parallel.zero=3", "fsdp2": "parallel.zero=3",
          "deepspeed_stage_1": "parallel.zero=1", "deepspeed_stage_2": "parallel.zero=2",
          "deepspeed_stage_3": "parallel.zero=3", "multi_gpu": "parallel.zero=0"}),
    Word("accelerator", means="the device is found; leave it out"),
    Word("data_parallel_replicate_degree dp_replicate_size dp_replicate num_distributed_optimizer_instances",
         "parallel.replicate={value}"),
    Word("data_parallel_shard_degree dp_shard_size dp_shard data_parallel_size data_parallel_degree dp_size dp",
         "parallel.shard={value}", "-1, the default, takes the ranks that are left"),
    Word("tensor_parallel_degree tensor_model_parallel_size tensor_parallel_size tp_size tp model_parallel_size "
         "tensor_parallel autotp_size mp_size",
         means="matrices are not split inside a layer; parallel.zero=3 splits their storage, parallel.ulysses and "
         "parallel.ring the tokens, parallel.pipeline the layers"),
    Word("sequence_parallel enable_sequence_parallel", "parallel.ulysses=N",
         "there is no tensor parallelism that this could accompany; N ranks share every sequence"),
    Word("context_parallel_degree context_parallel_size cp_size cp ring_degree", "parallel.ring={value}",
         "keys and values travel round a ring; parallel.ulysses shares attention by heads"),
    Word("sequence_parallel_degree sequence_parallel_size sp_size ulysses_degree", "parallel.ulysses={value}",
         "attention is shared by heads; parallel.ring shares it by keys and values that travel"),
    Word("context_parallel_load_balancer", "parallel.ring_order=zigzag", "or contiguous, or striped"),
    Word("context_parallel_rotate_method cp_comm_type ring_attn_func heads_k_stride", "parallel.ring=N",
         "by messages round a ring; parallel.ulysses=N: by an all-to-all"),
    Word("pipeline_parallel_degree pipeline_model_parallel_size pipeline_parallel_size pp_size pp pipeline.stages",
         "parallel.pipeline={value}"),
    Word("pipeline_parallel_schedule pp_schedule", "parallel.pipeline_schedule=1f1b",
         "possible are gpipe, 1f1b, interleaved_1f1b, zb_h1, zb_h2, zb_v, blockwise, auto, or a CSV",
         {"1f1b": "parallel.pipeline_schedule=1f1b", "gpipe": "parallel.pipeline_schedule=gpipe",
          "interleaved1f1b": "parallel.pipeline_schedule=interleaved_1f1b",
          "interleavedzerobubble": "parallel.pipeline_schedule=zb_h1", "zbvzerobubble": "parallel.pipeline_schedule=zb_v"}),
    Word("pipeline_parallel_schedule_csv", "parallel.pipeline_schedule={value}", "the path of a CSV, in torch's format"),
    Word("virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank", "parallel.virtual_stages={value}",
         "stages a rank"),
    Word("num_layers_per_virtual_pipeline_stage pipeline_parallel_layers_per_stage", "parallel.virtual_stages=N",
         "stages a rank; layers are cut into stages of nearly equal cost"),
    Word("pipeline_parallel_microbatch_size", "batch.micro_size={value}"),
    Word("num_pp_microbatches num_microbatches", "batch.global_size={size_of_accumulation}",
         "micro-batches are batch.global_size / (batch.micro_size x data ranks): now {accumulation}"),
    Word("expert_parallel_degree expert_model_parallel_size num_experts num_moe_experts moe_router_topk num_experts_per_tok "
         "num_local_experts moe_layer_freq",
         means="there are no mixtures of experts; every model here is dense (model=tiny to llama3_70b)"),
    Word("gradient_checkpointing activation_checkpointing recompute_granularity recompute_activations checkpoint_activations "
         "activation_checkpoint.mode activation_checkpoint recompute_method recompute_num_layers "
         "gradient_checkpointing_kwargs activation_checkpointing.partition_activations selective_checkpointing recompute",
         means="activations are kept, not computed again; a smaller batch.micro_size, parallel.ulysses, parallel.ring or "
         "parallel.pipeline makes them fewer on a rank"),
    Word("activation_offloading cpu_checkpointing",
         means="activations stay on the device; a smaller batch.micro_size, or parallel.ulysses, makes them fewer"),
    Word("overlap_grad_reduce overlap_param_gather overlap_comm reduce_bucket_size allgather_bucket_size ddp_bucket_cap_mb "
         "contiguous_gradients reduce_scatter stage3_prefetch_bucket_size stage3_max_live_parameters "
         "zero_optimization.stage3_param_persistence_threshold ddp_find_unused_parameters find_unused_parameters "
         "sync_module_states use_orig_params", means="messages overlap with the computation by themselves; leave it out"),
    Word("zero_quantized_weights zero_quantized_gradients",
         means="what ranks send each other is not rounded, so that a run is the same on every layout"),
    Word("nproc_per_node num_gpus devices gpus n_gpu num_processes ngpu num_gpus_per_node world_size", "nproc={value}",
         "workers a machine; null: one a GPU"),
    Word("nnodes num_nodes num_machines nodes", "--nodes {value}", "an option of `rowwise train`; --rendezvous HOST:PORT too"),
    Word("master_addr master_port rdzv_endpoint rdzv_backend main_process_ip main_process_port rdzv_id node_rank "
         "machine_rank standalone", "--rendezvous HOST:PORT", "where several machines meet; one machine needs nothing"),
    Word("local_rank rank device no_cuda use_cpu backend ddp_backend distributed_backend",
         means="the device and what its ranks talk by are found; CUDA_VISIBLE_DEVICES= makes it a CPU's"),
    Word("distributed_timeout_minutes", "parallel.timeout_seconds={seconds_of_minutes}", "seconds"),
    Word("ddp_timeout comm.init_timeout_seconds train_timeout_seconds", "parallel.timeout_seconds={value}", "seconds"),
)  # fmt: skip
