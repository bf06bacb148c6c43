"""Rewrite what is generated from the cards: ``python -m weft.papers``."""

from weft.papers.docs import repository, write

if __name__ == "__main__":
    for file in write(repository()):
        print(file)
