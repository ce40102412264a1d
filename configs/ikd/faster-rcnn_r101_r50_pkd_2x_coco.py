# Faster R-CNN: PKD. Published: 40.3 (mmrazor's table; its metafile says 40.4).
_base_ = "./faster-rcnn_r101_r50_pkd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
