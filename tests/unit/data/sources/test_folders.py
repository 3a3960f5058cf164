import importlib.util

from hfft.data.sources.folders import image_files, subfolders


def names(folder, files):
    return [file.relative_to(folder).as_posix() for file in files]


def test_image_files_are_sorted_and_of_any_depth(touch):
    folder = touch("b/2.png", "b/1.JPG", "a/deep/er/3.tiff", "4.webp", "notes.txt", "a/5", ".6.png", "a/.trash/7.png")
    assert names(folder, image_files(folder)) == ["4.webp", "a/deep/er/3.tiff", "b/1.JPG", "b/2.png"]


def test_photos_of_phones_are_images_where_the_plugin_is_installed(touch):
    folder = touch("ant/1.heic", "bee/1.png")
    heic = ["ant/1.heic"] if importlib.util.find_spec("pillow_heif") else []
    assert names(folder, image_files(folder)) == [*heic, "bee/1.png"]


def test_a_folder_with_the_name_of_an_image_is_none(touch):
    folder = touch("ant.png/1.jpg")
    assert names(folder, image_files(folder)) == ["ant.png/1.jpg"]


def test_a_link_to_nowhere_is_listed_so_that_the_audit_names_it(touch):
    folder = touch("ant/1.png")
    (folder / "ant" / "2.png").symlink_to(folder / "nowhere.png")
    assert names(folder, image_files(folder)) == ["ant/1.png", "ant/2.png"]


def test_the_files_of_a_link_to_a_folder(touch, tmp_path):
    (tmp_path / "link").symlink_to(touch("1.png"))
    assert names(tmp_path / "link", image_files(tmp_path / "link")) == ["1.png"]


def test_subfolders_are_sorted_and_neither_hidden_nor_special(touch):
    folder = touch("b/1.png", "a/1.png", ".git/1.png", "__MACOSX/1.png", "c.png")
    assert names(folder, subfolders(folder)) == ["a", "b"]


# Links and runs


def test_linked_folders_below_are_followed_and_circles_are_not(touch, tmp_path):
    folder = touch("ant/1.png")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/2.png").touch()
    (folder / "ant/linked").symlink_to(tmp_path / "more")
    (folder / "ant/circle").symlink_to(folder)
    assert names(folder, image_files(folder)) == ["ant/1.png", "ant/linked/2.png"]


def test_a_link_from_a_class_folder_to_a_folder_above_it(touch):
    folder = touch("ant/1.png", "bee/2.png")
    (folder / "ant/circle").symlink_to(folder)
    assert names(folder, image_files(folder / "ant")) == ["ant/1.png"]


def test_what_hfft_wrote_is_neither_a_class_nor_an_image(touch):
    run = [f"runs/{run}/{name}" for run in ("x", "y/fold-0") for name in ("recipe.yaml", "environment.json", "a.png")]
    folder = touch("ant/1.png", "bee/1.png", *run)
    assert names(folder, subfolders(folder)) == ["ant", "bee"]
    assert names(folder, image_files(folder)) == ["ant/1.png", "bee/1.png"]
    assert names(folder, image_files(folder / "runs/x")) == ["runs/x/a.png"]  # for who asks for it
