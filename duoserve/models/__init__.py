"""The computation: the decoder's blocks, and the families of models that are built of them."""
