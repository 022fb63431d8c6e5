"""A new Marian model of any size."""

from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerBase


def new_marian(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    d_model: int,
    layers: int,
    attention_heads: int,
    ffn_dim: int,
    dropout: float,
) -> MarianMTModel:
    """An encoder and decoder that share one embedding, with fresh weights.

    Args:
        tokenizer: joint, of both languages.
        max_length: tokens of the longest sentence.
        d_model: width.
        layers: of the encoder, and of the decoder.
        attention_heads: in each of them.
        ffn_dim: width of the feed-forward layers.
        dropout: in training.
    """
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=attention_heads,
        decoder_attention_heads=attention_heads,
        encoder_ffn_dim=ffn_dim,
        decoder_ffn_dim=ffn_dim,
        dropout=dropout,
        activation_function="relu",
        scale_embedding=True,
        init_std=d_model**-0.5,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = MarianMTModel(config)
    # One module instead of three that tie their weight: FSDP2 wants a shared parameter in one group.
    model.model.encoder.embed_tokens = model.model.decoder.embed_tokens = model.model.shared
    return model
