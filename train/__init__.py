"""Training PreResNets on CIFAR with the paper's recipe.

    cifar.py       the training command; `evaluate`, `campaign` and `land` are the others
    engine/        what computes: batches, steps, learners side by side, epochs, when to stop
    records/       what is kept: a run, the state that it continues from, the files of its folder
    scheduling/    the runs that the project is made of, and where they are computed

Commands use all three, scheduling uses records and `engine.stop`, engine uses records.
"""
