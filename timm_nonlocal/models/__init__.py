"""The networks under their registered names, in timm and in torchvision."""
