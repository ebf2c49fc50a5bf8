"""python -m sm_flex_vllm check MODEL"""

from sm_flex_vllm.check import main

main()
