"""`python -m sharpness`: the commands, one line each."""

print(
    """python -m sharpness.measure CHECKPOINT      how sharp is this checkpoint?
python -m sharpness.compare FIRST SECOND    do two checkpoints, or two groups, differ?
python -m sharpness.landscape CHECKPOINT    what does the loss look like around it?
python -m sharpness.train NETWORK           train small- and large-batch networks
python -m sharpness.batchsize --network N   which batch size should I use?
python -m sharpness.reproduce PAPER         a paper's tables, ours beside them

Each takes --help."""
)
