"""From files to masked token ids: formats, chat templates, packing, preview."""
