"""Translation: sentence pairs from every source, the tokenizer, the scores, and a pipeline that answers."""
