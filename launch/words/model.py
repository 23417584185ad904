"""Words for the model."""

from rowwise.launch.words.word import Word, switch

WORDS = (
    Word("hidden_size n_embd d_model embed_dim n_embed emb_dim", "model.dim={value}"),
    Word("num_hidden_layers num_layers n_layer n_layers depth num_blocks", "model.layers={value}"),
    Word("num_attention_heads n_head n_heads num_heads", "model.heads={value}"),
    Word("num_key_value_heads num_query_groups n_kv_heads n_kv_head num_kv_heads", "model.kv_heads={value}"),
    Word("group_query_attention", "model.kv_heads=N", "the number of key/value heads; now {kv_heads} of {heads} heads"),
    Word("head_dim kv_channels d_head", "model.head_dim={value}", "null: model.dim / model.heads"),
    Word("intermediate_size ffn_hidden_size ffn_dim d_ff n_inner hidden_dim", "model.ffn_dim={value}"),
    Word("vocab_size padded_vocab_size make_vocab_size_divisible_by", "model.vocab_size={value}"),
    Word("tie_word_embeddings tie_weights weight_tying", "model.tie_embeddings={value}"),
    Word("untie_embeddings_and_output_weights", values=switch("model.tie_embeddings=false", "model.tie_embeddings=true")),
    Word("rms_norm_eps layernorm_epsilon norm_epsilon layer_norm_eps layer_norm_epsilon norm_eps", "model.norm_eps={value}"),
    Word("rope_theta rotary_base rope_base", "model.rope_theta={value}"),
    Word("rope_scaling rope_scaling_factor use_rope_scaling rope_parameters", "model.rope_scaling={{factor: 8.0}}",
         "as Llama 3's; null is off"),
    Word("initializer_range init_method_std init_std", "model.init_std={value}"),
    Word("qk_layernorm qk_norm use_qk_norm", "model.qk_norm={value}"),
    Word("dropout attention_dropout hidden_dropout resid_pdrop attn_pdrop embd_pdrop",
         means="there is no dropout; leave it out"),
    Word("bias attention_bias mlp_bias add_bias_linear disable_bias_linear normalization hidden_act activation_func swiglu "
         "position_embedding_type use_rotary_position_embeddings squared_relu",
         means="every model is of Llama's or Qwen's form: no bias, RMSNorm, SwiGLU, rotary positions"),
    Word("model_name_or_path base_model pretrained_model_name_or_path pretrained_checkpoint initial_load_path model_id "
         "finetune init_from", "model.init_from={value}",
         "the folder of a Hugging Face model on this disk, which says its shape too"),
    Word("model_name model_type model.size arch flavor", group="model"),
    Word("config_name model_config", "model=NAME", "possible are the files of conf/model, and those of --config-dir"),
    Word("attn_implementation use_flash_attn flash_attention use_flash_attention sdp_attention attention_backend "
         "flash_attention_2 flex_attention xformers_attention",
         means="attention is chosen by the device: FlashAttention on GPUs in 16 bits; leave it out"),
    Word("use_liger_kernel flash_attn_cross_entropy", means="kernels are chosen by the device; leave it out"),
    Word("chunked_cross_entropy cross_entropy_loss_fusion cut_cross_entropy", "memory.fused_loss={value}",
         "the loss is made a tile of logits at a time; it is so where nothing is said"),
    Word("torch_compile compile.enable training.compile", "compile={value}", "torch.compile of each block"),
    Word("torch_compile_backend torch_compile_mode compile.backend", "compile=true", "by torch's own backend and mode"),
    Word("lora_r lora_rank lora_dim", "adapter=lora adapter.rank={value}"),
    Word("lora_alpha", "adapter=lora adapter.alpha={value}"),
    Word("lora_target_modules target_modules lora_target", "adapter=lora adapter.layers=[PATTERN]",
         "shell patterns of our names, '*.wq.weight' say; '*' is every linear layer"),
    Word("lora_target_linear", "adapter=lora adapter.layers=['*']"),
    Word("lora_modules_to_save modules_to_save", "adapter=lora adapter.train=[PATTERN]", "what learns beside the adapter, whole"),
    Word("use_rslora peft_use_rslora", "adapter=lora adapter.rslora=true"),
    Word("loraplus_lr_ratio", "adapter=lora adapter.b_lr_ratio={value}"),
    Word("use_peft peft use_lora finetuning_type", "adapter=lora"),
    Word("lora_dropout qlora load_in_4bit load_in_8bit use_dora peft_use_dora quantization",
         means="adapter=lora adds to matrices that are kept as they are; optim=apollo_mini or optim=galore trains whole ones with "
         "little state"),
    Word("freeze_all_layers freeze freeze_parameters", "optim.assign=[{{match: PATTERN, rule: frozen}}]", "by our names"),
    Word("unfrozen_parameters lisa_n_layers", means="what does not learn is named: optim.assign=[{match: PATTERN, rule: frozen}]"),
)  # fmt: skip
