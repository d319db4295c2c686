"""From a target (a name, a folder, a file, the Hub) to its tensors, and which of them make a nonlocal block."""
