"""StableMask in nanoGPT, by one flag and without a fork. In a nanoGPT checkout:

    python -m sm_flex_nanogpt train.py config/train_shakespeare_char.py --attn=stablemask
    python -m sm_flex_nanogpt sample.py --out_dir=out-shakespeare-char --attn=stablemask
    torchrun --standalone --nproc_per_node=4 -m sm_flex_nanogpt train.py --attn=stablemask --gamma=0.5

runs nanoGPT's own script with the rest of the command line, and writes nothing that the script would not write.

    --attn=causal         the script as it is
    --attn=stablemask     its attention replaced (attention.py), N = block_size
    --gamma=headwise      the default; or a number for every head, or one for each head with commas between
    --switch_attn         take a checkpoint that was trained with another attention (checkpoint.py)
"""
