"""Training: roles of one UNet, rollouts, objectives, the loop."""
