"""StableMask in nanochat, by one flag and without a fork. In a nanochat checkout:

    python -m sm_flex_nanochat scripts.base_train --attn=stablemask --depth=4
    python -m sm_flex_nanochat scripts.chat_cli --attn=stablemask
    torchrun --nproc_per_node=8 -m sm_flex_nanochat scripts.base_train --attn=stablemask --gamma=0.5

runs nanochat's own script with the rest of the command line, and writes nothing that the script would not write.

    --attn=causal         the script as it is
    --attn=stablemask     the two functions of nanochat.flash_attention replaced (attention.py), N = sequence_len
    --gamma=headwise      the default; or a number for every head, or one for each head with commas between
    --switch_attn         take a checkpoint that was trained with another attention (checkpoint.py)

base_train still says which kernel nanochat itself would have used.
"""
