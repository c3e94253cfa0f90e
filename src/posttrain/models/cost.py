def forward_flops(config, tokens, targets): return 0.0
