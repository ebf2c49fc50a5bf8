"""StableMask in torchtitan, by one flag, with nothing of torchtitan patched. Where torchtitan would be started:

    torchrun --nproc_per_node=8 -m sm_flex_torchtitan.train --attn stablemask --module llama3 --config llama3_8b

runs torchtitan's own trainer with the rest of the command line.

    --attn stablemask         StableMask on the backend of the config's attention (flex, flex_flash or varlen)
    --attn flex               one of torchtitan's own backends instead of the config's: flex, flex_flash or varlen
    --attn.gamma headwise     the default; or a number for every head, or one for each head with commas between
    --attn.length N           the training length; training.seq_len if it is not given
    --attn.learned            gamma is a parameter of each layer, which starts there

Without the launcher, torchtitan's own override does the same:

    python -m torchtitan.train ... --override.imports 'sm_flex_torchtitan.overrides.stablemask={"gamma": "headwise"}'

For llama3, qwen3, gpt_oss, deepseek_v3, kimi_k2_7, muse_glimmer and qwen3_5, and torchtitan 0.3, which needs torch 2.14. The
sinks of gpt_oss stay beside gamma; --attn.gamma inf is gpt_oss as it is, with the gradient that torchtitan's varlen loses.
"""

BACKENDS = ("flex", "flex_flash", "varlen")  # torchtitan's names for its own attentions
