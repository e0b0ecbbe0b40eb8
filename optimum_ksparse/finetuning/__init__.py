"""Fine-tuning sparse models: PEFT on sparse modules, merging that keeps the mask, and the study's recipes. PEFT is
imported by the functions that use it."""
