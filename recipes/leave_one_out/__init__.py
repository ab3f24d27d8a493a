"""Every task held out in turn: from scratch, from a mashup of the others, and from controls."""
