"""How the two passes of a step are done: for any kind of step and any method (`plain`, `compiled`), or for one (`fused_steps`,
`multi_tensor`, `multi_tensor_muon`); `table` says which."""
