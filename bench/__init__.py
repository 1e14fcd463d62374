"""The bench: what an adapter costs in time and memory, against peft, loralib, full fine-tuning and the frozen base.

    python -m bench                  every question, one table; about twenty minutes on two cores
    python -m bench overhead         one of: overhead, memory, job, training, decoding, merging, loading, mixing, llama
    python -m bench compiled         what torch.compile makes of adapters; some minutes
    python -m bench reference        peft's whole runs beside ours, for the study; forty minutes on two cores

To read the source, start at `timing.py`, then `peers.py`, then `overhead.py`.
"""
