"""Which images there are, in what order, decoded and cut into two views."""
