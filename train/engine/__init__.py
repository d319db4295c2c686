"""What computes.

    data         images as bytes on the device, and the plan of an epoch
    step         one learner: a network with its optimizer, and one training step of it
    pool         several learners side by side, eagerly or as one CUDA graph
    processes    the processes that share a run
    execution    what is set before the first step
    loop         the epochs, from any position to the end or to a cut
    stop         when to stop before the end, and the exit codes
    progress     what a terminal or a log shows of it
"""
