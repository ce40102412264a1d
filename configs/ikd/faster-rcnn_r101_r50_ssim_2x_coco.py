# Faster R-CNN: structural KD. Published: not known for this pair (the paper: 3.5 AP more than the student alone, from another
# teacher).
_base_ = "./faster-rcnn_r101_r50_ssim_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
