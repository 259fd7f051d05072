fn all_seen(row: u32, j: u32) -> bool {
    return tiles[row + j / TILE] == 1u;
}
