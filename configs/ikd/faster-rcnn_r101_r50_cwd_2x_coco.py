# Faster R-CNN: CWD. Published: not known (mmrazor has this pair's config, for 12 epochs, without a result).
_base_ = "./faster-rcnn_r101_r50_cwd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
