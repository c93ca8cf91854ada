"""Models and tokenizers: where they come from, how packed rows attend, how their loss is computed."""
