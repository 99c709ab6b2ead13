"""The GPT of a rank: layers, initial weights, the rows of the tags, the loss head."""
