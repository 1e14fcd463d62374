"""The experiments: a pretrained classifier learns sentiment with LoRA, in full precision or in 4 bits.

    python -m experiments.sst2 --method qlora
    python -m experiments.predict --adapter DIR "I absolutely loved this product!"
    python -m experiments.compare      every method; python -m experiments.sweep looks for settings
"""
