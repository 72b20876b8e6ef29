"""LoRA on Megatron's parallel linears: one adapter for each Hugging Face projection, as in PEFT."""
