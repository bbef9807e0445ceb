"""What is written for people and for other programs: vectors, sheets of pictures, tables."""
