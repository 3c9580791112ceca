"""`python -m mmvit COMMAND`, which launchers need: `torchrun -m mmvit train NAME`."""

from mmvit.cli import main

main()
