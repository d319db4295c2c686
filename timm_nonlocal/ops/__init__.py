"""The operator of eqs. (1) and (8): one custom operator of torch with its backends, and a plain reference."""
