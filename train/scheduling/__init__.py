"""The runs that the project is made of, and where they are computed."""
