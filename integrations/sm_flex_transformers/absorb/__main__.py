"""python -m sm_flex_transformers.absorb"""

from sm_flex_transformers.absorb.cli import main

main()
