"""Words for the data."""

from rowwise.launch.words.word import Word, switch

WORDS = (
    Word("dataset data_path train_file dataset_name train_data_path datasets dataset_path dataset_dir pretraining_dataset "
         "train_data data_dir input_dir", "data=text data.files={value}",
         "files, folders or globs on this disk; data=tokens for token files, data=hf for parquet, arrow and JSON lines"),
    Word("data_files", "data.files={value}", "with data=text, tokens or hf"),
    Word("text_column dataset_text_field field", "data.column={value}", "with data=hf"),
    Word("tokenizer tokenizer_path tokenizer_name tokenizer_model hf_assets_path tokenizer_config tokenizer_name_or_path "
         "vocab_file tokenizer_type", "data.tokenizer={value}", "the path of a tokenizer.json, or bytes; with data=text or hf"),
    Word("eos_token append_eod eod", "data.end_of_text={value}", "with data=text or hf"),
    Word("val_set_size validation_split test_size validation_split_percentage", "data.holdout={value}",
         "the share that is held out, such as 0.01"),
    Word("eval_dataset test_datasets valid_data_path validation_file validation.dataset split", "data.holdout=0.01",
         "the share of data.files that is held out; it has no files of its own"),
    Word("sample_packing packing pretrain_multipack_attn reset_attention_mask reset_position_ids eod_mask_loss "
         "dataloader_inter_document_masking batch_flattening pad_to_sequence_len block_cross_document_attention",
         "data.mask_documents=true", "documents are always packed into whole sequences; this keeps attention inside each",
         switch("data.mask_documents=true", "data.mask_documents=false")),
    Word("dataset_prepared_path data_cache_path", "data.cache_dir={value}", "with data=text, hf or stdlib"),
    Word("dataloader_num_workers num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_drop_last "
         "dataset_num_proc pin_memory persistent_workers preprocessing_num_workers dataset_processes",
         means="tokens are memory-mapped and read ahead by a thread; leave it out"),
    Word("shuffle shuffle_merged_datasets group_by_length train_sampling_strategy dataloader_type curriculum_learning "
         "data_efficiency curriculum_sampling", "seed={value}",
         "samples come in an order that seed decides, the same on every layout"),
    Word("data_seed training.seed random_seed manual_seed debug.seed seed_everything", "seed={value}"),
    Word("chat_template train_on_inputs datasets.type rl rl_beta reward_model sft dpo_loss_type",
         means="models are trained on every token of plain text; there are no conversations, masks of prompts or rewards"),
    Word("streaming", means="text is read a piece at a time, and its tokens are kept in data.cache_dir"),
)  # fmt: skip
