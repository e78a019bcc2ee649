"""The unmerged model, built by PEFT and transformers themselves."""
