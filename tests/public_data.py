"""Public datasets in miniature: small archives in the official layouts, and a host for them that can misbehave.

with host(folder) as server: ...    serves the files of `folder` with ranges; `server.faults` makes it fail
write_public(folder, url)           every archive and file of public.json; returns the table that names them
"""

import hashlib
import json
import random
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from mmllm.data.public import TABLE

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30)}
SPLITS = {
    1: "train",
    2: "train",
    3: "train",
    4: "restval",
    5: "val",
    6: "test",
    7: "train",
    8: "restval",
    9: "test",
}  # by number
NUMBERS = [*SPLITS]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        """Say nothing."""

    def do_GET(self):
        name = self.path.lstrip("/")
        self.server.requests.append((name, self.headers.get("Range")))
        fault = self.server.faults.get(name, [])
        kind = fault.pop(0) if fault else ""
        content = (self.server.folder / Path(name).name).read_bytes() if kind != "404" else b""
        if kind in ("404", "503"):
            self.send_error(int(kind))
            return
        if kind == "hub":  # as huggingface.co does: the checksum comes with the redirect
            self.send_response(302)
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Location", f"/storage/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if kind != "no ranges" else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        self.wfile.write(rest[: len(rest) // 2] if kind == "cut" else rest)
        self.close_connection = True


@contextmanager
def host(folder: Path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests, server.faults = folder, [], {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def colour_of(number: int) -> str:
    return [*COLOURS][number % len(COLOURS)]


def image(number: int) -> bytes:
    import io

    noise, content = random.Random(number), io.BytesIO()
    picture = Image.new("RGB", (40, 32), COLOURS[colour_of(number)])
    picture.putpixel((0, 0), tuple(noise.randrange(256) for _ in range(3)))  # no two have the same bytes
    picture.save(content, "JPEG")
    return content.getvalue()


def coco_name(number: int) -> str:
    part = "val2014" if SPLITS[number] in ("restval", "val", "test") else "train2014"
    return f"{part}/COCO_{part}_{number:012}.jpg"


def karpathy(names: dict[int, str], is_coco: bool) -> dict:
    rows = []
    for number, name in names.items():
        folder, _, file = name.rpartition("/")
        sentences = [{"raw": f"a {colour_of(number)} square"}, {"raw": f"all is {colour_of(number)}"}]
        row = {"filename": file, "imgid": number, "split": SPLITS[number], "sentences": sentences}
        rows.append(row | ({"cocoid": number, "filepath": folder} if is_coco else {}))
    return {"images": rows, "dataset": "coco"}


def vqa(part: str, ids: list[int], has_answers: bool = True) -> tuple[dict, dict]:
    asked = [{"image_id": i, "question": "What color is it?", "question_id": 1000 * i} for i in ids]
    answers = [
        {
            "question_id": 1000 * i,
            "image_id": i,
            "answer_type": "other",
            "multiple_choice_answer": colour_of(i),
            "answers": [{"answer": colour_of(i), "answer_id": n} for n in range(10)],
        }
        for i in ids
    ]
    return {"data_subtype": part, "questions": asked}, {"annotations": answers}


def textvqa(ids: list[int]) -> dict:
    rows = [
        {"question_id": i, "image_id": f"open{i}", "question": "What is written?", "answers": [colour_of(i)] * 10}
        for i in ids
    ]
    return {"data": rows}


def llava(name: str, number: int, image_file: str | None) -> dict:
    mark = "<image>\n" if image_file else ""
    turns = [{"from": "human", "value": f"{mark}What color?"}, {"from": "gpt", "value": colour_of(number)}]
    return {"id": name, "conversations": turns} | ({"image": image_file} if image_file else {})


MIX = [  # LLaVA's names of images, and the number of the photograph of COCO that each shows
    ("coco/train2017/000000000001.jpg", 1),
    ("coco/train2017/000000000004.jpg", 4),
    ("coco/train2017/000000000005.jpg", 5),  # of Karpathy's validation
    ("gqa/images/31.jpg", 6),  # of his test, by Visual Genome's table
    ("gqa/images/32.jpg", None),
    ("vg/VG_100K/33.jpg", 5),
    ("vg/VG_100K_2/34.jpg", 1),
    ("textvqa/train_images/open1.jpg", None),
    ("textvqa/train_images/open3.jpg", None),  # of TextVQA's validation
    ("ocr_vqa/images/99.jpg", None),
    (None, None),
]
LEFT_OUT, KEPT = 4, 6


def easy_vqa_split(numbers: list[int]) -> list[list]:
    return [
        row
        for i in numbers
        for row in (["what color is the shape?", colour_of(i), i], ["is there a circle?", "no" if i % 2 else "yes", i])
    ]


def archives() -> dict[str, dict[str, object]]:
    """The files of each entry of public.json by name; a JSON value, or bytes."""
    train, val = ([i for i in NUMBERS if coco_name(i).startswith(part)] for part in ("train", "val"))
    questions = {part: vqa(part, ids) for part, ids in (("train2014", train), ("val2014", val))}
    vg = [{"image_id": int(Path(n).stem), "coco_id": i} for n, i in MIX if n and n.startswith(("gqa", "vg"))]
    easy = "easy-VQA-master/easy_vqa/data"
    easy_numbers = {"train": list(range(20)), "test": list(range(5))}
    return {
        "coco-train2014": {coco_name(i): image(i) for i in train},
        "coco-val2014": {coco_name(i): image(i) for i in val},
        "coco-test2015": {f"test2015/COCO_test2015_{i:012}.jpg": image(i) for i in (91, 92)},
        "karpathy": {
            "dataset_coco.json": karpathy({i: coco_name(i) for i in NUMBERS}, True),
            "dataset_flickr30k.json": karpathy({i: f"{i}.jpg" for i in NUMBERS}, False),
        },
        "vqa-train": {"v2_OpenEnded_mscoco_train2014_questions.json": questions["train2014"][0]},
        "vqa-val": {"v2_OpenEnded_mscoco_val2014_questions.json": questions["val2014"][0]},
        "vqa-test": {"v2_OpenEnded_mscoco_test-dev2015_questions.json": vqa("test-dev2015", [91, 92])[0]},
        "vqa-train-answers": {"v2_mscoco_train2014_annotations.json": questions["train2014"][1]},
        "vqa-val-answers": {"v2_mscoco_val2014_annotations.json": questions["val2014"][1]},
        "flickr30k-images": {f"flickr30k-images/{i}.jpg": image(i) for i in NUMBERS},
        "llava-558k": {"": [llava(f"web{i}", i, f"0000{i % 2}/{i}.jpg") for i in range(6)]},
        "llava-558k-images": {f"0000{i % 2}/{i}.jpg": image(100 + i) for i in range(6)},
        "llava-665k": {"": [llava(f"mix{n}", n, name) for n, (name, _) in enumerate(MIX)]},
        "gqa-images": {f"images/{i}.jpg": image(i) for i in (31, 32)},
        "textvqa-images": {f"train_images/open{i}.jpg": image(200 + i) for i in (1, 2, 3)},
        "textvqa-train": {"": textvqa([1, 2])},
        "textvqa-val": {"": textvqa([3])},
        "vg-images": {"VG_100K/33.jpg": image(33)},
        "vg-images2": {"VG_100K_2/34.jpg": image(34)},
        "vg-ids": {"image_data.json": vg},
        "easy-vqa": {
            f"{easy}/{split}/images/{i}.png": image(300 + i) for split, ids in easy_numbers.items() for i in ids
        }
        | {f"{easy}/{split}/questions.json": easy_vqa_split(ids) for split, ids in easy_numbers.items()},
    }


def write_public(folder: Path, url: str) -> Path:
    """Writes all of them to `folder`, and table.json, which says that they are at `url`, with their checksums."""
    folder.mkdir(parents=True, exist_ok=True)
    table = json.loads(TABLE.read_text())
    for entry, members in archives().items():
        file = table["files"][entry]
        name = f"{entry}-{file['url'].rpartition('/')[2]}"  # images.zip is the name of several
        if "" in members:
            name = file["url"].rpartition("/")[2]
            (folder / name).write_text(json.dumps(members[""]))
        else:
            with zipfile.ZipFile(folder / name, "w") as archive:
                for member, content in members.items():
                    archive.writestr(member, content if isinstance(content, bytes) else json.dumps(content))
        file |= {"url": f"{url}/{name}", "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        file["size"] = (folder / name).stat().st_size
    (folder / "table.json").write_text(json.dumps(table))
    return folder / "table.json"
