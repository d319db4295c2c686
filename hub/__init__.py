"""What is published: the paper's figures beside ours, the cards, the pictures, and the command that uploads them."""
