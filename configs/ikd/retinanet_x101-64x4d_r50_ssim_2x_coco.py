# RetinaNet: structural KD. Published: 40.6 for 24 epochs (the paper, as others cite it; its teacher is not known).
_base_ = "./retinanet_x101-64x4d_r50_ssim_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
