"""The tokenizer gives back what it took, also when saved and loaded."""

from momo_hf.recipes.translation.bpe import train_bpe
from momo_hf.recipes.translation.cldr import sentence_pairs


def test_tokenizer_round_trip(tmp_path):
    pairs = sentence_pairs({"train": 300})["train"]
    tokenizer = train_bpe([text for pair in pairs for text in pair.values()], 500, 64)
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    for pair in pairs[:50]:
        encoded = loaded(pair["de"])
        assert set(encoded) == {"input_ids", "attention_mask"}
        ids = encoded["input_ids"]
        assert ids[-1] == loaded.eos_token_id
        assert loaded.decode(ids, skip_special_tokens=True).strip() == pair["de"]
