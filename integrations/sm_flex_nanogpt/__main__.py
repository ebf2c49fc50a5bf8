from sm_flex_nanogpt.launcher import main

main()
