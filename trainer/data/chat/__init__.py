"""Conversations: rows of files -> messages -> text by the tokenizer's own template -> tokens, and which of them are learned."""
