"""Words for how a run trains: its length and batch, the optimizer, the schedule, precision."""

from rowwise.launch.words.word import Word, switch

WORDS = (
    # How long, and how much at a time.
    Word("max_steps train_iters max_iters num_steps total_steps training.steps total_iters iters iterations", "steps={value}",
         "optimizer steps of the whole run, also of one that goes on"),
    Word("train_samples", "steps={steps_of_samples}", "a step takes batch.global_size={global_size} sequences"),
    Word("num_train_epochs num_epochs max_epochs", "epochs={value}",
         "in the place of steps: times that the run reads the data"),
    Word("max_tokens train_tokens num_tokens", "tokens={value}",
         "in the place of steps: all that the run reads; a step takes {tokens}"),
    Word("per_device_train_batch_size train_micro_batch_size_per_gpu micro_batch_size local_batch_size "
         "per_gpu_train_batch_size device_batch_size microbatch_size training.batch_size", "batch.micro_size={value}",
         "sequences a forward of one rank; batch.global_size={global_size} is that of a step over all ranks"),
    Word("gradient_accumulation_steps accumulate_grad_batches grad_accum_steps", "batch.global_size={size_of_accumulation}",
         "gradient accumulation is batch.global_size / (batch.micro_size x data ranks): now {accumulation}"),
    Word("train_batch_size global_batch_size total_batch_size batch_size", "batch.global_size={value}",
         "sequences a step over all ranks, of which a forward takes batch.micro_size={micro_size}"),
    Word("num_tokens_per_train_step", "batch.global_tokens={value}",
         "in the place of batch.global_size: the tokens of a step, now {tokens}"),
    Word("seq_length sequence_len sequence_length max_seq_length max_seq_len block_size seq_len max_length context_length "
         "model_max_length cutoff_len encoder_seq_length max_context_length", "batch.seq_len={value}", "tokens of a sequence"),
    Word("max_position_embeddings n_positions n_ctx", "batch.seq_len={value}",
         "positions are rotary, and have no largest number of their own; a sequence has batch.seq_len tokens"),
    Word("rampup_batch_size step_batch_size_schedule auto_find_batch_size decrease_batch_size_if_needed",
         means="a batch has the same size in every step; give batch.global_size, and batch.micro_size by hand"),
    Word("exit_duration_in_mins max_time exit_interval",
         means="a run ends after its steps, or saves and leaves when it is asked to (SIGTERM, Ctrl-C); `rowwise slurm` asks "
         "it slurm.signal_seconds before the limit"),
    # The optimizer.
    Word("learning_rate lr max_lr peak_lr base_lr warmup_max_lr", "optim.lr={value}",
         "the highest of the run, which schedule= varies"),
    Word("optimizer optimizer_name optimizer.name optimizer.type", group="optim"),
    Word("weight_decay wd l2", "optim.weight_decay={value}"),
    Word("adam_beta1 beta1", "optim.betas=[{value},{beta2}]", "both betas stand in one list: now [{beta1},{beta2}]"),
    Word("adam_beta2 beta2", "optim.betas=[{beta1},{value}]", "both betas stand in one list: now [{beta1},{beta2}]"),
    Word("betas", "optim.betas={value}"),
    Word("adam_epsilon adam_eps epsilon eps", "optim.eps={value}"),
    Word("momentum sgd_momentum muon_momentum", "optim.momentum={value}", "that of Adam's rules is the first of optim.betas"),
    Word("max_grad_norm clip_grad gradient_clipping gradient_clip_val grad_clip max_norm clip_grad_norm optim.clip_norm",
         "clip_norm={value}", "the largest global norm of a gradient; 0 is off"),
    Word("optim_target_modules", "optim.assign=[{{match: PATTERN, rule: adamw}}]", "rules by name"),
    Word("qgalore_rank", "optim.rank={value}"),
    Word("update_proj_gap qgalore_update_proj_gap", "optim.refresh_every={value}"),
    Word("optim_args", "optim.KEY=VALUE", "every argument of a rule is a key of its own"),
    Word("early_step_in_backward optimizer_in_bwd", means="without clipping (clip_norm=0) and accumulation",
         values=switch("optim.in_backward=true", "optim.in_backward=false")),
    Word("fused foreach fused_adam optimizer.implementation torch_adam apex",
         means="kernels are chosen by the device; leave it out"),
    Word("optimizer_cpu_offload offload_optimizer zero_optimization.offload_optimizer.device offload_optimizer_device "
         "cpu_offload offload_param zero_optimization.offload_param.device offload_params enable_cpu_offload "
         "offload_param_device fsdp_offload_params nvme_path",
         means="nothing is kept outside a device's memory; states are split by parallel.zero=1 to 3 and made small by "
         "optim=adamw8bit (2 bytes a parameter) or optim=apollo"),
    Word("ema ema_decay use_ema swa_lrs",
         means="no average of the weights is kept; schedule=wsd ends a run on the decay that replaces it"),
    Word("embedding_lr embedding_lr_scale decoupled_lr lr_groups", means="all parameters have optim.lr"),
    # The schedule.
    Word("lr_scheduler_type lr_scheduler lr_decay_style scheduler scheduler.type lr_schedule lr_scheduler.name "
         "lr_scheduler.decay_type", group="schedule"),
    Word("warmup_steps lr_warmup_iters warmup_iters num_warmup_steps lr_warmup_steps warmup_num_steps",
         "schedule.warmup_steps={value}", "or schedule.warmup, a share of the run"),
    Word("warmup_ratio lr_warmup_fraction warmup", "schedule.warmup={value}", "a share of the run"),
    Word("min_lr lr_min lr_end eta_min", "schedule.floor={floor}", "a share of optim.lr, which the rate ends at"),
    Word("cosine_min_lr_ratio min_lr_rate min_lr_ratio lr_scheduler.lr_min min_lr_factor final_lr_frac",
         "schedule.floor={value}", "a share of optim.lr, which the rate ends at"),
    Word("lr_decay_iters lr_decay_steps", "steps={value}", "every schedule ends with the run"),
    Word("lr_wsd_decay_iters wsd_decay_steps num_decay_steps", "schedule.decay_steps={value}",
         "with schedule=wsd; or schedule.decay_share"),
    Word("decay_ratio warmdown_ratio", "schedule.decay_share={value}", "with schedule=wsd"),
    Word("lr_wsd_decay_style", "schedule.decay={value}", "with schedule=wsd"),
    Word("lr_scheduler_kwargs scheduler.params lr_div_factor", "schedule.KEY=VALUE", "every argument is a key of its own"),
    Word("decay_lr", values=switch("schedule=cosine", "schedule=constant")),
    Word("auto_lr_find", "experiment=lr_range", "raises the rate until the loss blows up"),
    # Precision.
    Word("bf16 bfloat16 bf16.enabled bf16_full_eval", means="float32 parameters, products in bfloat16",
         values=switch("precision=bf16", "precision=fp32") | {"auto": "precision=bf16", "full": "precision=bf16"}),
    Word("fp16 float16 fp16.enabled half fp16_full_eval amp fp16_opt_level", means="with a loss scale that adapts itself",
         values=switch("precision=fp16", "precision=fp32")),
    Word("fp32 float32", values=switch("precision=fp32")),
    Word("mixed_precision dtype torch_dtype mixed_precision_param params_dtype autocast_dtype", group="precision"),
    Word("tf32 allow_tf32", "precision.tf32={value}", "with precision=fp32"),
    Word("fp8 fp8_format fp8_recipe use_fp8 float8 fp8_param", "precision=bf16", "8-bit products are not built"),
    Word("loss_scale initial_loss_scale", "precision.initial_scale={value}", "with precision=fp16; it then adapts itself"),
    Word("initial_scale_power", "precision.initial_scale={power}", "with precision=fp16"),
    Word("loss_scale_window", "precision.growth_every={value}", "with precision=fp16"),
    Word("accumulate_allreduce_grads_in_fp32 fp32_allreduce mixed_precision_reduce grad_reduce_in_bf16 "
         "communication_data_type grad_accum_dtype", "precision.reduce=fp32",
         "with precision=bf16: the dtype in which gradients are summed"),
    Word("main_params_dtype", "optim.param_dtype=bf16", "bfloat16 parameters, rounded stochastically, instead of float32 ones"),
)  # fmt: skip
