from sm_flex_nanochat.launcher import main

main()
