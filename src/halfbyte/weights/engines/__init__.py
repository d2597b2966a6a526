"""The layouts of Blackwell engines: no kernel of halfbyte reads them."""
