"""The families of models that folders of Hugging Face hold, as data."""
