"""The experiments: a pretrained classifier learns sentiment with LoRA, in full precision or in 4 bits; so does a language model
what it is to answer.

    python -m experiments.sst2 --method qlora
    python -m experiments.predict --adapter DIR "I absolutely loved this product!"
    python -m experiments.compare      every method; python -m experiments.sweep looks for settings
    python -m experiments.sft --method qlora
    python -m experiments.chat --adapter DIR "Hello"
"""
