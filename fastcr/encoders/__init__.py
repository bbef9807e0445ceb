"""Networks from images to feature maps, the branch that attends to them, and where their weights come from."""
