"""What is kept: a run, the state that it continues from, and the files of its folder."""
