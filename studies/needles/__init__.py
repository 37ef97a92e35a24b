"""The study: every method at every budget on the needle benchmark, before and after light finetuning."""
