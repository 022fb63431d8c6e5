"""One task a file; what a file holds is in `momo_hf.recipes.yardstick.task`."""

# In the order of the tables.
TASKS = (
    "digits",
    "mnist",
    "clicks",
    "clicks_small_batches",
    "translation_demo",
    "multi30k",
    "diffusion",
    "vit",
    "finetuned_translation",
    "lora_vit",
    "gpt2_captions",
    "lora_translation",
    "resnet20",
    "text_to_image",
    "bert_captions",
    "gpt2",
    "iwslt14",
    "minilm",
)
