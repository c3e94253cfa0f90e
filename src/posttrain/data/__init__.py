"""Sources, row shapes, chat rendering and mixtures: from files to token ids with trainable spans."""
